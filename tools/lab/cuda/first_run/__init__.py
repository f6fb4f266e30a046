"""What a first run on a GPU does: ``tools/first_gpu_run.sh``, see docs/gpu.md.

`plan` says what is done in which order, `steps` does it within its limits of time, and `summary`
writes the page that is read afterwards. These, `tools` and `build` need nothing but Python, so that
a machine without torch gets a page too.
"""
