"""Images of chats: read and checked when data are prepared, stored beside the tokens, decoded by the loader.

    sources.py  the file of a picture, however it is named    chat.py     one form for all records with images
    check.py    whether a picture decodes, and its features   encoder.py  chats to tokens, images filled in
    place.py    the images among the tokens of a batch        decode.py   their pixels, in threads

Nothing is imported here: worker processes import this package and must start fast.
"""
