"""Adapters for trainers. Each module speaks one trainer's names and units; none of them computes a loss.

Import the one you need: ``from rlkernels.integrations import trl``. Importing an adapter does not import its trainer.
"""
