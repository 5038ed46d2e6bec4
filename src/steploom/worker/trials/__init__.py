"""Trials: does a pipeline give under weaving what it gives alone?"""
