"""Small labelled data sets for the recipes of `configs/tasks/`, made without a network.

    python -m jaxgpt.tasks.sample_data --task=sentiment --out=DIR

writes train.jsonl, validation.jsonl and test.jsonl. Most rows come from a grammar: templates with
slots. The test rows are new in the way that matters for the task:

    sentiment       templates that no other split has
    tagging         templates and names that no other split has
    questions       passages on things, people and numbers that no other split has
    retrieval       combinations of topics, and templates, that no other split has
    translation     numbers that no other split has
    summarization   functions of modules of the standard library that no other split has, none of
                    which, nor its summary, is in a training row
    chat            questions on numbers that no other split has
"""
