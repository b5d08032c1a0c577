"""Text-to-SQL over generated SQLite schemas: a task whose success is executed, not guessed.

`generate` makes questions, `corpus` the text on which the small base model was pretrained, `tokenizer` its vocabulary.
Nothing here imports torch.
"""
