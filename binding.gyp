{
  "targets": [{
    "target_name": "martlet",
    "type": "none",
    "actions": [{
      "action_name": "cmake_js",
      "inputs": ["CMakeLists.txt"],
      "outputs": ["<(PRODUCT_DIR)/martlet.node", "<(PRODUCT_DIR)/.always-run"],
      "action": [
        "node", "<!(node -p \"require.resolve('cmake-js/bin/cmake-js')\")", "build",
        "--directory", "<(module_root_dir)", "--out", "<(module_root_dir)/build/cmake",
        "--config", "<(CONFIGURATION_NAME)", "--CDCMAKE_LIBRARY_OUTPUT_DIRECTORY=<(PRODUCT_DIR)"
      ]
    }]
  }]
}
