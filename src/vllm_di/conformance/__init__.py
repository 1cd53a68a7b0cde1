"""The contract tests that any port can run."""
