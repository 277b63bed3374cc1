# SPDX-License-Identifier: Apache-2.0
"""The stability suite: networks that really diverge, and what keeps them from it or brings them back."""
