# SPDX-License-Identifier: Apache-2.0
r"""The ``pss-repair`` command."""

from .main import main

__all__ = ["main"]
