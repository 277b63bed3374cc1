# SPDX-License-Identifier: Apache-2.0
r"""What to say when an optional package is not installed."""

from pss_param.errors import PssError

__all__ = ["MissingPackageError"]


class MissingPackageError(PssError, ImportError):
    r"""An optional package is not installed; the message names the command that installs it.

    Args:
        package: What is missing.
        extra: The extra of this package that brings it.

    Example:
        >>> print(MissingPackageError("lightning", "lightning"))
        lightning is not installed; run: pip install "pss-param[lightning]"
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'{package} is not installed; run: pip install "pss-param[{extra}]"')
