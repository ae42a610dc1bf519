from musubi_tuner.ltx2_inspect_dataset import main

if __name__ == "__main__":
    main()
