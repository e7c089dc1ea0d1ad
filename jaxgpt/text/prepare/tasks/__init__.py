"""The tasks of each job of a preparation.

Each function ends in the arguments (rank, folder, progress) of `jobs.RunTask`: it writes the
outputs of task `rank` into `folder` and returns the task's account. `stores` are the folders of
cleaned documents (`document_store`), by rank.
"""
