"""Requests to tokens: scheduler, pages, runner, sampling, speculation, HTTP API."""
