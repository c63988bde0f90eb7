"""Files: whole or not at all (``atomic``), and safetensors from anyone (``safetensors``)."""
