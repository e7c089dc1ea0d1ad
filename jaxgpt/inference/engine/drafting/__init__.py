"""Drafting: tokens that are guessed cheaply, and that the model verifies several at a time.

acceptance.py   the choice of guesses, by which the text keeps the model's distribution
drafter.py      the interface of drafters, and the options
model.py        guesses of a smaller model
ngrams.py       guesses from the text itself: what followed its last words before
"""
