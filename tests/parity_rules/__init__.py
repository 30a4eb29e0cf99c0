"""How golden parity data are made and compared (the methods' specification, section 10). `tests/parity.py` runs it."""
