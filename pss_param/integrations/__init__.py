# SPDX-License-Identifier: Apache-2.0
r"""Guards inside other people's training loops; each module is imported only when it is asked for.

- :mod:`pss_param.integrations.transformers`: a callback for the Hugging Face ``Trainer``.
- :mod:`pss_param.integrations.lightning`: a callback for Lightning.

accelerate needs nothing from here: ``accelerator.register_for_checkpointing(guard)`` and ``guard.step(norm)``.
"""
