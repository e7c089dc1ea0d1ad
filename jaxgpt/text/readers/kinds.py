"""Kinds of data, and limits of the readers. Imports nothing, because `jaxgpt --help` needs it."""

# kind -> its columns by name; those in brackets may be missing. `id` may be there in any kind.
KINDS = {
  "text": ("text",),
  "classification": ("text", "[text_pair]", "label"),
  "seq2seq": ("input", "target"),
  "chat": ("messages", "[tools]"),
  "preference": ("[prompt]", "chosen", "rejected", "[tools]"),  # no prompt: an empty one
}

EXAMPLES = 5  # dropped documents that a report names, per rule
MAX_BYTES = 64 << 20  # length of the longest record
