"""The one error of this package that is the caller's to mend."""


class UserError(ValueError):
    """The caller gave something we cannot use.

    The message is one line: the rule, what arrived, what to do. The command line prints it without a traceback
    and ends with exit code 2.
    """
