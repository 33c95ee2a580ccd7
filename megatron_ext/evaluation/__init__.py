"""What a model knows, in numbers: questions, forms to ask them in, scores, and their errors."""
