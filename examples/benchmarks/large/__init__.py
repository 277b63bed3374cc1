# SPDX-License-Identifier: Apache-2.0
"""Text, network and measurements of ``gpt2.py``."""
