"""From a checkpoint file to a folder for timm and the Hub.

Models are known here by their registered names only.
"""
