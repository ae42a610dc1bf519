from musubi_tuner.ltx2_demo import main

if __name__ == "__main__":
    main()
