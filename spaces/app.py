"""The page of `dsd demo` as a Hugging Face Space: this file with requirements.txt, next to README.md."""

from dsd.demo import launch

launch()
