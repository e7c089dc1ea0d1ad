"""`jaxgpt import` and `jaxgpt export`."""
