# SPDX-License-Identifier: Apache-2.0
"""Placeholder; the lead fills in the public names."""

from pss_param.version import __version__ as __version__
