"""MNN: conversion of graphs, bundles, tokenizer files, chat templates, and the LLM engine in a child process."""
