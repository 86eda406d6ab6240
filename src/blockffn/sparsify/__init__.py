"""Turns a dense model into a sparse one: its FFN neurons become experts, and a router is fitted to what they compute.

Stages, each of which the receipt compares with the original: loaded into our architecture, neurons regrouped into
experts, routed. Training with a teacher (`blockffn train --teacher`) recovers what routing costs.
"""
