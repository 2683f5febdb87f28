"""Trains and evaluates a text classifier with softmax and with Nyström attention, side by side."""


class UsageError(Exception):
    """Bad input; the message is one line that says the rule, the value and the way out."""
