"""pretrain.train with the check of free space taken out, so that a write really runs into a full disk."""

if __name__ == "__main__":
    from pretrain.checkpointing import checkpointer as checkpoint
    from pretrain.train import main

    checkpoint.check_free_space = lambda directory, num_bytes: None
    main()
