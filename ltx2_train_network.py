from musubi_tuner.ltx2_train_network import main

if __name__ == "__main__":
    main()
