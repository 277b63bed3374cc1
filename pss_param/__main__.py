# SPDX-License-Identifier: Apache-2.0
r"""``python -m pss_param`` is ``pss-repair``."""

from pss_param.cli import main

if __name__ == "__main__":
    main()
