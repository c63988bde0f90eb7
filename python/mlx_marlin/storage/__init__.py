"""Files: written whole or not at all (``atomic``), read in many pieces at once (``reads``), JSON from anyone
(``untrusted``), and safetensors (``safetensors``).
"""
