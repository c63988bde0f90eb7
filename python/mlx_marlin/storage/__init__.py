"""Files: whole or not at all (``atomic``), JSON from anyone (``untrusted``), and safetensors (``safetensors``)."""
