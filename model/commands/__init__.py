"""What the commands that decode an export share: modes by name, decoding options, prompts from files. No torch here.

The decode loops themselves are the files shipped with exports, in model/hf/.
"""
