"""qkern within other libraries, a module for each, which imports that library.

Nothing here is imported by ``import qkern``. A module named like a library joins qkern to it:
``qkern.integrations.transformers`` to transformers.
"""
