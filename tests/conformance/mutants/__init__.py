"""Components with one flaw each, and the cases of the suite that must notice it."""
