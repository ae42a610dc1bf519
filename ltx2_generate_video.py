from musubi_tuner.ltx2_generate_video import main

if __name__ == "__main__":
    main()
