"""Kinds of data, and limits of the readers. Imports nothing, because `jaxgpt --help` needs it."""

# kind -> its columns by name; those in brackets may be missing. `id` may be there in any kind.
KINDS = {
  "text": ("text",),
  "classification": ("text", "[text_pair]", "label"),
  "seq2seq": ("input", "target"),
  "chat": ("messages", "[tools]", "[chat_template_kwargs]"),
  # No prompt: an empty one.
  "preference": ("[prompt]", "chosen", "rejected", "[tools]", "[chat_template_kwargs]"),
  "multi_label": ("text", "[text_pair]", "labels"),
  "tagging": ("words", "tags"),
  "question_answering": ("question", "context", "answers"),
  "retrieval": ("query", "positive"),
}

LABELLED = ("classification", "multi_label", "tagging")  # kinds whose labels are classes
MARKED = ("tagging", "question_answering")  # kinds whose labels belong to places in the text

EXAMPLES = 5  # dropped documents that a report names, per rule
MAX_BYTES = 64 << 20  # length of the longest record
