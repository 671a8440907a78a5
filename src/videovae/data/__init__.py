"""Videos in and out: folder -> index -> clips -> this rank's batches.

Import from the modules. This file imports nothing, so that loader workers start without torch.
"""
