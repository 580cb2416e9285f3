"""The error types: each message names the value or layer, where it stands, and what to write instead."""


class NoRuleError(LookupError):
    """An Op that needs a rule of its own (dense, conv) and got none from the composite."""


class UnknownPrimitiveError(NotImplementedError):
    """A primitive carries relevance and has no kind yet, or cannot be explained at all."""


class SelectorError(ValueError):
    """A selector names an unknown kind, or a row of a composite can apply to nothing."""


class TargetError(ValueError):
    """A target does not fit the function's output."""


class InputError(ValueError):
    """An argument, a parameter or a rule's number is not what it must be."""


class SweepError(RuntimeError):
    """A sweep's folder cannot be written or read, belongs to another sweep, or its stream of batches broke off."""
