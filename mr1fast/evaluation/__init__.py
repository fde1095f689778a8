"""How good is it? Accuracies, and the tables, pages and pictures that show them.

evaluate.py     lets a model answer every problem of a data set
answers.py      each answer on disk as soon as it is there
result.py       what that returns: each problem with its answers, and the accuracies over all problems
figures.py      the accuracies as rows with titles, for the terminal and for the report
terminal.py     the tables that evaluation prints, and training before and after
report.py       report.html of an evaluation: the mistakes with their images
samples.py      samples.png of a training run: a few problems, answered before and after
curves.py       curves.png: what training runs logged, over their steps
drawing.py      what the two pictures share
"""
