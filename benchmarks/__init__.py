"""What is measured, and how: ``python -m benchmarks.NAME``. Figures and method are in
docs/benchmarks.md."""
