"""Files: written whole or not at all (``atomic``), read in many pieces at once (``reads``), untrusted JSON
(``untrusted``), and safetensors (``safetensors``).
"""
