"""How good is it: accuracies, and what shows them.

evaluate.py     the function: a model answers every problem of a data set
result.py       what it returns: each problem as it was answered, and the accuracies over all of them
figures.py      the accuracies as rows with titles, for both of the next two
terminal.py     what is printed: of an evaluation, and of a training run before and after
report.py       report.html of an evaluation: the mistakes with their images
samples.py      samples.png of a training run: a few problems, answered before and after
curves.py       curves.png: what training runs logged, over their steps
drawing.py      what these two pictures share
"""
