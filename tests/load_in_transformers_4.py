"""What transformers 4.49 makes of a model folder: run by its own Python, see test_save.py.

Reads questions.json ([[image file, question], ...]), writes what the folder's model says to each to OUTPUT.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image

folder, questions, output = map(Path, sys.argv[1:])
processor = transformers.AutoProcessor.from_pretrained(folder)
model, found = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
answers = []
for image, question in json.loads(questions.read_text()):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.open(image)], return_tensors="pt")
    with torch.no_grad():
        answers.append({"input_ids": inputs["input_ids"], "logits": model(**inputs).logits})
about = {
    "version": transformers.__version__,
    "processor": type(processor).__name__,
    "tokenizer": type(processor.tokenizer).__name__,
    "model": type(model).__name__,
    "wrong": [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]],
    "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
}
torch.save({"about": about, "answers": answers}, output)
