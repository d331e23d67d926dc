"""`surtitle demo`: media made of a world in which every right answer is known, and what became of it."""
