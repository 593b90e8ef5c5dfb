"""Kinds of suites: named evaluations beside the run's own; stages/suite.py chooses among them."""
