# SPDX-License-Identifier: Apache-2.0
"""Matrices, rivals and tables of ``spectra.py``."""
