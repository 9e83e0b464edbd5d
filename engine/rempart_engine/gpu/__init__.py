"""The engine's steps on a GPU: launched without waiting, replayed from graphs where they are small.

Everything here also runs in Triton's interpreter, on CPU tensors: copies are then plain, and a graph is a function.
"""
