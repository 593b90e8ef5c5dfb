"""The command line: parse, load the recipe, call one stage, print. No heavy import at start."""

KEPT = "what was finished is kept: run the same command again to go on"
"""What is said where a command was ended from outside."""
