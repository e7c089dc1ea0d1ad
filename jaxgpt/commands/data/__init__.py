"""`jaxgpt data` and its second words."""
