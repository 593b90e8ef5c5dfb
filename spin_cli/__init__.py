"""The command line: parse, load the recipe, call one stage, print. No heavy import at start."""
