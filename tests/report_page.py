"""Problems as they were answered, and the page that shows them, read."""

from dataclasses import replace
from html.parser import HTMLParser

from mr1fast.evaluation.result import Answered

SETTINGS = {"data": "vc", "split": "test", "model": "a <b> model", "sampled": 1, "temperature": 1.0}


def answered(solution, answer, index=0, **changes):
    completion = f"<think></think><answer>{answer}</answer>"
    made = Answered(index, f"row {index}", "How many?", solution, completion, answer, solution == answer, True, (True,))
    return replace(made, **changes)


class Page(HTMLParser):
    """Checks that tags are closed in order; collects images and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.text = [], set(), [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
