"""The file with the state of a run, which `finetune` continues from. This module imports nothing heavy."""
import pickle

__all__ = ['STATE_ERRORS', 'STATE_FILE']

STATE_FILE = 'checkpoints/timm_eca.pt'
# What torch, pickle and wrong contents raise for a damaged one.
STATE_ERRORS = (
    AttributeError, EOFError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError,
    pickle.UnpicklingError)
